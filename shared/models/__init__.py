"""Networks, and how their weights begin, are averaged and leave."""

"""How weights begin, are averaged and leave."""

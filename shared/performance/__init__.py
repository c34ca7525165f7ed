"""What training costs and how fast it goes."""

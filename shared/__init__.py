"""What a reader of the paper need not read, one concern a module. Imports no recipe."""

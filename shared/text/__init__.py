"""Text to rows of tokens, and back."""

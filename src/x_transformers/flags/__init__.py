"""Every keyword of every constructor, declared once."""

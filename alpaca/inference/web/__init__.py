"""The live demo: a chat page and the server behind it."""

"""Any OpenAI-compatible server: one request, many at once, and their cost."""

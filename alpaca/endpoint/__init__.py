"""Any OpenAI-compatible server: one request, many at once, and what they may cost."""

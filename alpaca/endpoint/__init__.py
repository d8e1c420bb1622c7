"""Any OpenAI-compatible server: one client, many requests in flight, budgets."""

"""The one client of every LLM that is used: requests, the reply store, limits, prices, asking."""

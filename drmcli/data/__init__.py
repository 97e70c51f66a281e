"""Preference data: pictures, archives, published layouts, prompts, and the cache of what is encoded."""

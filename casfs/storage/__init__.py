"""Where objects are kept: named, write-once, durable before they have their name."""

"""Who may open what: recipients, identities, and the sessions that are wrapped to them."""

"""Keys: recipients, identities, sessions, and what this machine trusts."""

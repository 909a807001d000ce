"""Keys: recipients, identities, write sessions, and the repositories that this machine trusts."""

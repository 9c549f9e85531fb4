"""From installed entry points into the hosts' registries, and back out. Imports nothing of the other packages."""

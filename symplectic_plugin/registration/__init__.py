"""Registration of installed entry points with the hosts, and its reversal. Imports no other package of the plugin."""

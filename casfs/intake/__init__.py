"""Taking files in: the walk of the sources, the capture of each file, the backup of them all."""

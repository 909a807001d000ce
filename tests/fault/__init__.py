"""What must hold when something goes wrong: changing sources, damage, crashes, full and failing disks."""

"""Which channels matter: feature maps measured on calibration images, ranks, and one file per criterion."""

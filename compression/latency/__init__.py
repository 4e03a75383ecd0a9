"""How long a narrow network takes in the runtime that will run it: measured on drawn widths, and predicted for all others."""

"""A student learns from a teacher: losses and the frozen teacher."""

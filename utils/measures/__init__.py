"""What a network is worth and what it costs: accuracy, parameters, multiply-adds."""

"""How good an encoder is: features, probes, pictures and the report."""

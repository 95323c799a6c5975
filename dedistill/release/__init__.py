"""Getting out: adapters merged into their base, models and adapters in the formats that other programs load."""

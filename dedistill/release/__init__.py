"""Getting out: adapters merged into their base, models and adapters in the forms that other programs load."""

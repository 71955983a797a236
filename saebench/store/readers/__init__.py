"""The readers that a FeatureStore is composed of; each owns some tables and their queries."""

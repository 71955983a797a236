"""What a FeatureStore is composed of: small readers, each of which owns some tables and their queries."""

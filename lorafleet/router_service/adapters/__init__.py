"""lorafleet.registry.v1.AdapterService: a registry's adapters over gRPC, and their weights in pieces."""

"""The whole service under load: real processes, callers of many tenants, both doors."""

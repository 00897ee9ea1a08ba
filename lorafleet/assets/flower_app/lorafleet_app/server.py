from lorafleet.coordinator.server_app import app

__all__ = ["app"]

from lorafleet.clients.app import app

__all__ = ["app"]

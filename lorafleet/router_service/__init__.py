"""The router service: which adapters answer a request, and the gRPC server that lets them.

``lorafleet.router_service.server.Server`` is the service; importing this package loads neither torch nor grpc.
"""

from lorafleet.router_service.routers import ROUTERS

__all__ = ["ROUTERS"]

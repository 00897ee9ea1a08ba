"""What an engine says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was loaded, and gauges of this moment."""

    requests_running: int
    requests_waiting: int
    requests_finished_total: int
    """ended with a result, cancelled ones too"""
    requests_failed_total: int
    prompt_tokens_total: int
    """prompt tokens computed"""
    prefix_tokens_total: int
    """tokens that were found in the cache instead"""
    preemptions_total: int
    """how often a request gave up its memory for another and was computed again"""
    kv_pages: int
    kv_pages_in_use: int
    generated_tokens_total: int
    steps_total: int
    adapter_packings_total: int
    """how often the active adapters' rows were copied together"""
    adapters_loaded: int
    """names"""
    adapters_on_device: int
    """versions; each is counted once, where it is nearest to the device"""
    adapters_on_host: int
    adapters_on_disk: int
    adapter_device_bytes: int
    adapter_host_bytes: int
    adapter_loads_total: int
    """how often an adapter was put on the device"""
    adapter_evictions_total: int
    """how often one left the device for another"""
    adapter_disk_reads_total: int
    """how often one was read again from its folder"""

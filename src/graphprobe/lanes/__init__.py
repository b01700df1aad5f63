"""Lanes: several executions of two graphs inside one probe graph, in native and in exact arithmetic."""

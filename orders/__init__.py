"""Orders of the waiting queue beside first come, first served; they are chosen by name, and one's own are like them."""

from twinserve.orders.cache_aware import CacheAware
from twinserve.orders.ranked import LeastUrgent, Priority, Ranked, ShortestJob

__all__ = ["CacheAware", "LeastUrgent", "Priority", "Ranked", "ShortestJob"]

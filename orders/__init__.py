"""Orders of the waiting queue beside first come, first served; they are chosen by name, and one's own are like them."""

from twinserve.orders.cache_aware import CacheAware
from twinserve.orders.loading import Loading
from twinserve.orders.ranked import LeastUrgent, Priority, Ranked, ShortestJob

__all__ = ["CacheAware", "LeastUrgent", "Loading", "Priority", "Ranked", "ShortestJob"]

"""Publishing the record to MLflow; the only package that imports mlflow, and only when a store is opened."""

from bnbench.tracking.address import mask, tracking_uri
from bnbench.tracking.live import LiveLog, Place, places
from bnbench.tracking.pages import pages_of
from bnbench.tracking.publish import Counts, publish
from bnbench.tracking.publisher import Publisher
from bnbench.tracking.runs import trial_of_run
from bnbench.tracking.store import Store, open_store
from bnbench.tracking.ui import serve_ui

__all__ = [
    "Counts",
    "LiveLog",
    "Place",
    "Publisher",
    "Store",
    "mask",
    "open_store",
    "pages_of",
    "places",
    "publish",
    "serve_ui",
    "tracking_uri",
    "trial_of_run",
]

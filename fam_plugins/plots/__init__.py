"""Pictures of maps, pairs, episodes and ranked lists, drawn with matplotlib.

Every function takes images in any form (:mod:`fam_plugins.core.images`) and returns a figure that
shows itself at the end of a notebook's cell, or is saved with ``figure.savefig("maps.png")``. It is
made without pyplot: nothing global changes, and it is freed with its last reference.
"""

from fam_plugins.plots.maps import plot_episode, plot_map, plot_pair, plot_retrieval
from fam_plugins.plots.matches import plot_matches

__all__ = ["plot_episode", "plot_map", "plot_matches", "plot_pair", "plot_retrieval"]

from .. import launch

launch.main("efficiency")

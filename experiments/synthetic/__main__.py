from .. import launch

launch.main("synthetic")

from .. import launch

launch.main("lra")

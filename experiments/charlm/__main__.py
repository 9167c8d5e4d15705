from .. import launch

launch.main("charlm")

from .. import launch

launch.main("decision")

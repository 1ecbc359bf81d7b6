"""From talking-face videos to shards: sources, stages, planning, Ray runner and quarantine. Knows no model."""

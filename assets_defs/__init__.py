"""The Dagster project: assets over the steps of `pipelines`, their partitions, jobs, schedules and sensors."""

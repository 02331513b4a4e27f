"""Gristmill's steps: pure functions over files, free of Dagster. Read `ls` from top to bottom as the architecture."""

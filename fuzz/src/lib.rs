//! Shared entry points of the fuzz targets.

"""From files to normalized batches: catalog, reading, statistics, normalization, augmentation."""

"""What every package uses: errors, files, settings, processes, progress."""

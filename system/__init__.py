"""What lies below a run: processes, devices, files, locks."""

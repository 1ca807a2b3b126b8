"""Human labels: a simulated annotator for demos, import of labels from files, and agreement between people and graders."""

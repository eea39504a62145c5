"""What happens to one Dynamo graph: options, detection, takeover, passes, Inductor."""

#!/bin/sh
# Give the rules to the Prometheus operator, and the dashboards to Grafana's sidecar. May be run again after a change.
set -eu
cd "$(dirname "$0")/.."
for rules in recording alerts; do
    {
        printf 'apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata: { name: amira-%s }\nspec:\n' "$rules"
        sed 's/^/  /' "prometheus/rules/$rules.yml"
    } | kubectl -n monitoring apply -f -
done
kubectl create configmap amira-dashboards --from-file grafana/json --dry-run=client -o yaml |
    kubectl -n monitoring apply --server-side -f -
kubectl -n monitoring label --overwrite configmap amira-dashboards grafana_dashboard=1
